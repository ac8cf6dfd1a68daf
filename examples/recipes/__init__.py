"""Recipes: functions that return a training config, as Megatron-Bridge's recipes do."""

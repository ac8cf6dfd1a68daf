"""A small vision-language model that reads handwritten numbers, trained with its modules in different layouts."""

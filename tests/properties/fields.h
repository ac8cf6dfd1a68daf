// Named integer fields of a struct as text: "name=3 list=1,2", those only that differ from a default.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mimo_ext::properties {

inline std::string text_of(std::int64_t value) {
  return std::to_string(value);
}

inline std::string text_of(const std::vector<std::int64_t>& values) {
  std::string text;
  for (std::int64_t value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text.empty() ? "-" : text;
}

inline void read(const std::string& text, std::int64_t& value) {
  std::size_t used = 0;
  value = std::stoll(text, &used);
  if (used != text.size()) throw std::invalid_argument("expected a number, got '" + text + "'");
}

inline void read(const std::string& text, std::vector<std::int64_t>& values) {
  values.clear();
  if (text == "-") return;
  std::istringstream in(text);
  for (std::string item; std::getline(in, item, ',');) read(item, values.emplace_back());
}

/// `Fields(object, visit)` calls visit(name, field) for every field, in one order.
template <typename T, typename Fields>
std::string print_fields(const T& object, const Fields& fields) {
  std::vector<std::string> usual;
  T defaults;
  fields(defaults, [&](const std::string&, auto& field) { usual.push_back(text_of(field)); });
  std::string text;
  std::size_t index = 0;
  fields(object, [&](const std::string& name, const auto& field) {
    const std::string value = text_of(field);
    if (value != usual[index++]) text += (text.empty() ? "" : " ") + name + "=" + value;
  });
  return text;
}

template <typename T, typename Fields>
T parse_fields(const std::string& text, const Fields& fields) {
  T object;
  std::istringstream in(text);
  for (std::string item; in >> item;) {
    const std::size_t equals = item.find('=');
    bool found = false;
    fields(object, [&](const std::string& name, auto& field) {
      if (equals == std::string::npos || item.substr(0, equals) != name) return;
      read(item.substr(equals + 1), field);
      found = true;
    });
    if (!found) throw std::invalid_argument("'" + item + "': no field of that name");
  }
  return object;
}

}  // namespace mimo_ext::properties

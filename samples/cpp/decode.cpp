// Greedy decoding on an engine of `hqmq-trt build`, without Python: the command line.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.h"

namespace {

constexpr char kUsage[] =
    "usage: hqmq_decode ENGINE_FOLDER PLUGIN_LIBRARY (--tokens ID,ID,... | --tokens-file FILE)\n"
    "                   [-n NEW_TOKENS] [--stop ID]... [--max-context TOKENS]\n"
    "Prints the ids of the new tokens on one line; speed goes to standard error.\n";

struct Options {
  std::string folder, plugins;
  std::vector<int64_t> tokens;
  std::set<int64_t> stop;
  int64_t new_tokens = 128, max_context = 0;
};

int64_t number(const std::string& text, const std::string& what, int64_t least) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  require(used > 0 && used == text.size() && value >= least && value <= INT32_MAX,
          what + ": '" + text + "' is not a whole number of at least " + std::to_string(least));
  return value;
}

std::vector<int64_t> token_list(std::string text, const std::string& what) {
  std::replace(text.begin(), text.end(), ',', ' ');
  std::istringstream words(text);
  std::vector<int64_t> tokens;
  for (std::string word; words >> word;) tokens.push_back(number(word, what, 0));
  return tokens;
}

Options parse(int count, char** arguments) {
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name.empty() || name[0] != '-') {
      places.push_back(name);
      continue;
    }
    require(i + 1 < count, name + " needs a value\n" + kUsage);
    const std::string value = arguments[++i];
    if (name == "--tokens") {
      options.tokens = token_list(value, name);
    } else if (name == "--tokens-file") {
      std::ifstream file(value);
      require(file.good(), value + ": cannot be read");
      std::stringstream text;
      text << file.rdbuf();
      options.tokens = token_list(text.str(), value);
    } else if (name == "-n") {
      options.new_tokens = number(value, name, 1);
    } else if (name == "--stop") {
      options.stop.insert(number(value, name, 0));
    } else if (name == "--max-context") {
      options.max_context = number(value, name, 1);
    } else {
      throw std::runtime_error("unknown option " + name + "\n" + kUsage);
    }
  }
  require(places.size() == 2,
          std::string("an engine folder and a plugin library are needed\n") + kUsage);
  require(!options.tokens.empty(), std::string("no prompt\n") + kUsage);
  options.folder = places[0];
  options.plugins = places[1];
  return options;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void run(const Options& options) {
  Decoder decoder(options.folder, options.plugins, options.max_context);
  // The last new token is never appended.
  const int64_t needed = static_cast<int64_t>(options.tokens.size()) + options.new_tokens - 1;
  require(needed <= decoder.max_context(),
          std::to_string(needed) + " tokens are needed, the cache holds " +
              std::to_string(decoder.max_context()) + "; raise --max-context, or lower -n");
  for (const int64_t token : options.tokens) {
    require(token < static_cast<int64_t>(decoder.vocabulary()),
            "token " + std::to_string(token) + " is outside the vocabulary of " +
                std::to_string(decoder.vocabulary()));
  }
  auto start = std::chrono::steady_clock::now();
  int64_t token = decoder.prefill(options.tokens);
  const double read = seconds_since(start);
  std::vector<int64_t> tokens;
  start = std::chrono::steady_clock::now();
  while (options.stop.count(token) == 0) {
    tokens.push_back(token);
    if (static_cast<int64_t>(tokens.size()) == options.new_tokens) break;
    token = decoder.decode(token);
  }
  const double written = seconds_since(start);
  for (size_t i = 0; i < tokens.size(); ++i) std::cout << (i ? " " : "") << tokens[i];
  std::cout << '\n';
  const double rate = tokens.size() > 1 ? static_cast<double>(tokens.size() - 1) / written : 0.0;
  std::fprintf(stderr,
               "%zu prompt tokens at %.0f/s, %zu new at %.1f/s, cache %.1f MB for %lld tokens\n",
               options.tokens.size(), static_cast<double>(options.tokens.size()) / read,
               tokens.size(), rate, static_cast<double>(decoder.cache_bytes()) / 1e6,
               static_cast<long long>(decoder.max_context()));
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(parse(count, arguments));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

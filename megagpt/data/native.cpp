// The inner loops of the data pipeline: exact BPE with a cache of chunks, gathering of samples,
// document boundaries, and blends. Called through ctypes by native.py, which states the contracts;
// each function has an equal in Python that the tests compare it with.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

constexpr char32_t kSpaceMark = 0x2581;
constexpr std::string_view kSpaceMarkUtf8 = "\xE2\x96\x81";
constexpr int32_t kNoSymbol = -1;

// Reads one character of valid UTF-8 and moves p behind it.
inline char32_t next_char(const uint8_t*& p) {
  const uint8_t lead = *p++;
  if (lead < 0x80) return lead;
  const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  char32_t c = lead & (0x3Fu >> more);
  for (int i = 0; i < more; ++i) c = c << 6 | (*p++ & 0x3Fu);
  return c;
}

inline uint64_t mix(uint64_t x) {
  x *= 0x9E3779B97F4A7C15ull;
  return x ^ (x >> 32);
}

// SentencePiece's piece types.
enum Type : uint8_t { kNormal = 1, kUserDefined = 4, kByte = 6 };

// Of two symbols or two characters; the upper bit keeps it from being 0.
inline uint64_t pair_key(uint32_t a, uint32_t b) {
  return 1ull << 63 | static_cast<uint64_t>(a) << 32 | b;
}

// Two symbols that BPE joins, and what they become.
struct Merge {
  uint64_t key;
  int32_t result;
  float score;
};

struct Pair {
  uint64_t key;
};

// Open addressing of slots by their key, 0 in an empty one; of equal keys the first is kept.
template <typename Slot>
class Table {
 public:
  void build(const std::vector<Slot>& all) {
    size_t size = 16;
    while (size < 4 * all.size()) size *= 2;
    slots_.assign(size, Slot{});
    mask_ = size - 1;
    for (const Slot& slot : all) {
      size_t i = mix(slot.key) & mask_;
      while (slots_[i].key && slots_[i].key != slot.key) i = (i + 1) & mask_;
      if (!slots_[i].key) slots_[i] = slot;
    }
  }
  const Slot* find(uint64_t key) const {
    for (size_t i = mix(key) & mask_; slots_[i].key; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return &slots_[i];
    }
    return nullptr;
  }

 private:
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

// Which characters stand side by side in some piece. BPE joins two symbols only into a piece, so
// between any other two characters no piece can lie, and the text may be cut there.
class PairSet {
 public:
  PairSet() : ascii_(128 * 128, 0) {}
  void insert(char32_t a, char32_t b) {
    if (a < 128 && b < 128) ascii_[a << 7 | b] = 1;
    else seen_.insert(pair_key(a, b));
  }
  void freeze() {
    std::vector<Pair> pairs;
    for (uint64_t key : seen_) pairs.push_back({key});
    others_.build(pairs);
    seen_.clear();
  }
  bool contains(char32_t a, char32_t b) const {
    if (a < 128 && b < 128) return ascii_[a << 7 | b];
    return others_.find(pair_key(a, b)) != nullptr;
  }

 private:
  std::vector<uint8_t> ascii_;
  std::unordered_set<uint64_t> seen_;
  Table<Pair> others_;
};

// Tokens of a chunk of up to 16 bytes; half a cache line.
struct CachedChunk {
  uint64_t low, high;
  uint8_t length, count;  // bytes of the chunk; tokens, 0 marks an empty entry
  uint16_t unused;
  int32_t ids[3];
};
static_assert(sizeof(CachedChunk) == 32);

// Two-way cache of fixed size: the newer of two chunks that meet stands first.
class ChunkCache {
 public:
  explicit ChunkCache(size_t num_bytes) {
    size_t sets = 1;
    while (sets * 4 * sizeof(CachedChunk) <= num_bytes) sets *= 2;
    entries_.assign(2 * sets, CachedChunk{});
    mask_ = sets - 1;
  }
  CachedChunk* find(uint64_t low, uint64_t high, size_t length) {
    CachedChunk* set = &entries_[2 * (hash(low, high, length) & mask_)];
    if (matches(set[0], low, high, length)) return &set[0];
    if (matches(set[1], low, high, length)) {
      std::swap(set[0], set[1]);
      return &set[0];
    }
    return nullptr;
  }
  void insert(uint64_t low, uint64_t high, size_t length, const int32_t* ids, size_t count) {
    CachedChunk* set = &entries_[2 * (hash(low, high, length) & mask_)];
    set[1] = set[0];
    set[0].low = low;
    set[0].high = high;
    set[0].length = static_cast<uint8_t>(length);
    set[0].count = static_cast<uint8_t>(count);
    std::copy(ids, ids + count, set[0].ids);
  }

 private:
  static bool matches(const CachedChunk& c, uint64_t low, uint64_t high, size_t length) {
    return c.low == low && c.high == high && c.length == length && c.count;
  }
  static uint64_t hash(uint64_t low, uint64_t high, size_t length) {
    return mix(mix(low + length) + high);
  }
  std::vector<CachedChunk> entries_;
  size_t mask_;
};

class Bpe {
 public:
  Bpe(const uint8_t* pieces, const int64_t* offsets, const float* scores, const uint8_t* types,
      int32_t num_pieces, bool splits_at_mark, size_t cache_bytes)
      : splits_at_mark_(splits_at_mark), cache_(cache_bytes), byte_ids_(256, kNoSymbol) {
    std::vector<std::string_view> text(num_pieces);
    for (int32_t id = 0; id < num_pieces; ++id) {
      text[id] = std::string_view(reinterpret_cast<const char*>(pieces) + offsets[id],
                                  static_cast<size_t>(offsets[id + 1] - offsets[id]));
      if (types[id] == kByte) {  // <0x41>
        byte_ids_[std::stoi(std::string(text[id].substr(3, 2)), nullptr, 16)] = id;
      } else if (types[id] == kNormal || types[id] == kUserDefined) {
        add_pairs(text[id]);
        if (types[id] == kUserDefined) {
          user_defined_.emplace(text[id], id);
          longest_user_defined_ = std::max(longest_user_defined_, text[id].size());
        } else {
          symbols_.emplace(text[id], id);
        }
      }
    }
    pairs_.freeze();
    // Characters of pieces that are none themselves are symbols too: they can be joined.
    int32_t next_symbol = num_pieces;
    for (int32_t id = 0; id < num_pieces; ++id) {
      if (types[id] != kNormal) continue;
      for (size_t begin = 0; begin < text[id].size();) {
        const size_t end = char_end(text[id], begin);
        if (symbols_.emplace(text[id].substr(begin, end - begin), next_symbol).second) {
          ++next_symbol;
        }
        begin = end;
      }
    }
    std::vector<Merge> merges;
    for (int32_t id = 0; id < num_pieces; ++id) {
      if (types[id] != kNormal) continue;
      for (size_t cut = char_end(text[id], 0); cut < text[id].size(); cut = char_end(text[id], cut)) {
        const auto left = symbols_.find(text[id].substr(0, cut));
        const auto right = symbols_.find(text[id].substr(cut));
        if (left != symbols_.end() && right != symbols_.end()) {
          merges.push_back({pair_key(left->second, right->second), id, scores[id]});
        }
      }
    }
    merges_.build(merges);
    num_pieces_ = num_pieces;
    // Symbols of single characters, looked up for each character of a chunk that is not cached.
    for (const auto& [piece, id] : symbols_) {
      if (char_end(piece, 0) == piece.size()) {
        const uint8_t* p = reinterpret_cast<const uint8_t*>(piece.data());
        chars_.emplace(next_char(p), id);
      }
    }
    std::fill(ascii_, ascii_ + 128, kNoSymbol);
    for (const auto& [c, id] : chars_) {
      if (c < 128) ascii_[c] = id;
    }
    const auto mark = chars_.find(kSpaceMark);
    if (mark != chars_.end()) ascii_[' '] = mark->second;
  }

  // Tokens of one document; returns the end of what it wrote.
  template <typename Token>
  Token* encode(const uint8_t* p, const uint8_t* end, Token* out) {
    if (p == end) return out;
    const uint8_t* start = p;
    char32_t previous = next_char(p);
    while (p != end) {
      const uint8_t* here = p;
      // Most of most texts: two ASCII characters, the space among them.
      const char32_t c = next_char(p);
      if (!joined(previous, c)) {
        out = chunk(start, here, end, out);
        start = here;
      }
      previous = c;
    }
    return chunk(start, end, end, out);
  }

 private:
  struct Symbol {
    int32_t id;       // kNoSymbol: a character of no piece, or one that was joined to its left
    int32_t previous, next;
    uint32_t begin, size;  // bytes of the chunk
    bool frozen;
  };
  struct Candidate {
    float score;
    int32_t left, left_id, right_id;
    bool operator<(const Candidate& other) const {
      return score < other.score || (score == other.score && left > other.left);
    }
  };

  static size_t char_end(std::string_view text, size_t begin) {
    size_t end = begin + 1;
    while (end < text.size() && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) ++end;
    return end;
  }

  void add_pairs(std::string_view piece) {
    const uint8_t* p = reinterpret_cast<const uint8_t*>(piece.data());
    const uint8_t* end = p + piece.size();
    if (p == end) return;
    char32_t previous = next_char(p);
    while (p < end) {
      const char32_t c = next_char(p);
      // In the text a space stands where pieces have the mark.
      for (char32_t a : {previous, previous == kSpaceMark ? U' ' : previous}) {
        for (char32_t b : {c, c == kSpaceMark ? U' ' : c}) pairs_.insert(a, b);
      }
      previous = c;
    }
  }

  bool joined(char32_t a, char32_t b) const {
    if (splits_at_mark_ && (a == kSpaceMark || b == kSpaceMark)) return false;
    return pairs_.contains(a, b);
  }

  template <typename Token>
  Token* chunk(const uint8_t* begin, const uint8_t* end, const uint8_t* text_end, Token* out) {
    const size_t length = static_cast<size_t>(end - begin);
    if (length > 16) {
      merge(begin, length);
      return std::copy(ids_.begin(), ids_.end(), out);
    }
    uint64_t low = 0, high = 0;
    if (text_end - begin >= 16) {
      std::memcpy(&low, begin, 8);
      std::memcpy(&high, begin + 8, 8);
      if (length < 8) {
        low &= (1ull << (8 * length)) - 1;
        high = 0;
      } else if (length < 16) {
        high &= (1ull << (8 * (length - 8))) - 1;
      }
    } else {
      std::memcpy(&low, begin, std::min<size_t>(length, 8));
      if (length > 8) std::memcpy(&high, begin + 8, length - 8);
    }
    if (const CachedChunk* found = cache_.find(low, high, length)) {
      // Room for what is written too much is left by the caller.
      for (int i = 0; i < 3; ++i) out[i] = static_cast<Token>(found->ids[i]);
      return out + found->count;
    }
    merge(begin, length);
    if (ids_.size() <= 3) cache_.insert(low, high, length, ids_.data(), ids_.size());
    return std::copy(ids_.begin(), ids_.end(), out);
  }

  int32_t char_symbol(char32_t c) const {
    if (c < 128) return ascii_[c];
    const auto found = chars_.find(c);
    return found == chars_.end() ? kNoSymbol : found->second;
  }

  // BPE over one chunk into ids_: the best pair is joined, the leftmost of equals, until none is.
  void merge(const uint8_t* begin, size_t length) {
    ids_.clear();
    split(begin, length);
    const int32_t count = static_cast<int32_t>(line_.size());
    if (count <= 24) {
      merge_by_scanning(count);
    } else {
      merge_by_heap(count);
    }
    for (int32_t i = 0; i != kNoSymbol; i = line_[i].next) {
      const Symbol& symbol = line_[i];
      if (symbol.frozen || (symbol.id != kNoSymbol && symbol.id < num_pieces_)) {
        ids_.push_back(symbol.id);
        continue;
      }
      // A space without a piece never comes here: native.py asks for one.
      for (uint32_t b = 0; b < symbol.size; ++b) {
        ids_.push_back(byte_ids_[begin[symbol.begin + b]]);
      }
    }
  }

  void split(const uint8_t* begin, size_t length) {
    line_.clear();
    const uint8_t* p = begin;
    const uint8_t* end = begin + length;
    while (p < end) {
      Symbol symbol{kNoSymbol, static_cast<int32_t>(line_.size()) - 1,
                    static_cast<int32_t>(line_.size()) + 1,
                    static_cast<uint32_t>(p - begin), 0, false};
      const uint8_t* behind = p;
      const char32_t c = next_char(behind);
      size_t matched = 0;
      if (splits_at_mark_ && c == kSpaceMark) {
        p = behind;  // a mark in the text is no space: it stays without a symbol and becomes bytes
      } else if ((matched = user_defined_prefix(p, static_cast<size_t>(end - p), &symbol.id))) {
        symbol.frozen = true;
        p += matched;
      } else {
        symbol.id = char_symbol(c);
        p = behind;
      }
      symbol.size = static_cast<uint32_t>(p - begin) - symbol.begin;
      line_.push_back(symbol);
    }
    line_.back().next = kNoSymbol;
  }

  size_t user_defined_prefix(const uint8_t* p, size_t length, int32_t* id) {
    if (longest_user_defined_ == 0) return 0;
    // The mark may stand for a space, so the pieces are compared with the text as pieces have it.
    written_.clear();
    sizes_.clear();
    for (size_t i = 0; i < length && written_.size() < longest_user_defined_;) {
      const size_t char_begin = i;
      do ++i; while (i < length && (p[i] & 0xC0) == 0x80);
      if (p[char_begin] == ' ') {
        written_ += kSpaceMarkUtf8;
      } else {
        written_.append(reinterpret_cast<const char*>(p) + char_begin, i - char_begin);
      }
      sizes_.emplace_back(written_.size(), i);
    }
    for (auto at = sizes_.rbegin(); at != sizes_.rend(); ++at) {
      const auto found = user_defined_.find(written_.substr(0, at->first));
      if (found != user_defined_.end()) {
        *id = found->second;
        return at->second;
      }
    }
    return 0;
  }

  const Merge* mergeable(int32_t left, int32_t right) const {
    const Symbol &a = line_[left], &b = line_[right];
    if (a.id == kNoSymbol || b.id == kNoSymbol || a.frozen || b.frozen) return nullptr;
    return merges_.find(pair_key(a.id, b.id));
  }

  void join(int32_t left, int32_t right, int32_t result) {
    Symbol &a = line_[left], &b = line_[right];
    a.id = result;
    a.size += b.size;
    a.next = b.next;
    if (b.next != kNoSymbol) line_[b.next].previous = left;
    b.id = kNoSymbol;
    b.size = 0;
  }

  void merge_by_scanning(int32_t count) {
    const Merge* found[24];
    for (int32_t i = 0; i + 1 < count; ++i) found[i] = mergeable(i, i + 1);
    for (;;) {
      int32_t best = kNoSymbol;
      for (int32_t i = 0; line_[i].next != kNoSymbol; i = line_[i].next) {
        if (found[i] && (best == kNoSymbol || found[i]->score > found[best]->score)) best = i;
      }
      if (best == kNoSymbol) return;
      join(best, line_[best].next, found[best]->result);
      const Symbol& joined = line_[best];
      found[best] = joined.next == kNoSymbol ? nullptr : mergeable(best, joined.next);
      if (joined.previous != kNoSymbol) {
        found[joined.previous] = mergeable(joined.previous, best);
      }
    }
  }

  void merge_by_heap(int32_t count) {
    candidates_.clear();
    for (int32_t i = 0; i + 1 < count; ++i) propose(i, i + 1, false);
    std::make_heap(candidates_.begin(), candidates_.end());
    while (!candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end());
      const Candidate best = candidates_.back();
      candidates_.pop_back();
      const int32_t right = line_[best.left].next;
      // One of the two may have been joined to another since.
      if (right == kNoSymbol || line_[best.left].id != best.left_id ||
          line_[right].id != best.right_id || line_[best.left].size == 0) {
        continue;
      }
      join(best.left, right, merges_.find(pair_key(best.left_id, best.right_id))->result);
      const Symbol joined = line_[best.left];
      if (joined.next != kNoSymbol) propose(best.left, joined.next, true);
      if (joined.previous != kNoSymbol) propose(joined.previous, best.left, true);
    }
  }

  void propose(int32_t left, int32_t right, bool is_heap) {
    if (const Merge* found = mergeable(left, right)) {
      candidates_.push_back({found->score, left, line_[left].id, line_[right].id});
      if (is_heap) std::push_heap(candidates_.begin(), candidates_.end());
    }
  }

  bool splits_at_mark_;
  ChunkCache cache_;
  std::vector<int32_t> byte_ids_;
  std::unordered_map<std::string_view, int32_t> symbols_;  // views of the caller's pieces
  std::unordered_map<std::string, int32_t> user_defined_;
  size_t longest_user_defined_ = 0;
  PairSet pairs_;
  Table<Merge> merges_;
  int32_t num_pieces_ = 0;
  std::unordered_map<char32_t, int32_t> chars_;
  int32_t ascii_[128];
  // Scratch, kept between chunks.
  std::vector<int32_t> ids_;
  std::vector<Symbol> line_;
  std::vector<Candidate> candidates_;
  std::string written_;
  std::vector<std::pair<size_t, size_t>> sizes_;
};

template <typename Token>
int64_t encode_documents(Bpe* bpe, const uint8_t* text, const int64_t* offsets,
                         int64_t num_documents, int32_t eod, Token* out, int32_t* lengths) {
  Token* place = out;
  for (int64_t d = 0; d < num_documents; ++d) {
    Token* begin = place;
    place = bpe->encode(text + offsets[d], text + offsets[d + 1], place);
    *place++ = static_cast<Token>(eod);
    lengths[d] = static_cast<int32_t>(place - begin);
  }
  return place - out;
}

// The index's arrays lie unaligned in its file.
template <typename T>
inline T load(const uint8_t* base, int64_t i) {
  T value;
  std::memcpy(&value, base + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <typename Token>
int64_t copy_tokens(const uint8_t* bin, int64_t start, int64_t count, int64_t* out) {
  int64_t largest = -1, smallest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = load<Token>(bin, start + i);
    largest = std::max(largest, token);
    smallest = std::min(smallest, token);
    out[i] = token;
  }
  return smallest < 0 ? INT64_MAX : largest;
}

int64_t copy_tokens_of(int32_t code, const uint8_t* bin, int64_t start, int64_t count,
                       int64_t* out) {
  switch (code) {
    case 1: return copy_tokens<uint8_t>(bin, start, count, out);
    case 2: return copy_tokens<int8_t>(bin, start, count, out);
    case 3: return copy_tokens<int16_t>(bin, start, count, out);
    case 4: return copy_tokens<int32_t>(bin, start, count, out);
    case 5: return copy_tokens<int64_t>(bin, start, count, out);
    default: return copy_tokens<uint16_t>(bin, start, count, out);
  }
}

}  // namespace

extern "C" {

void* megagpt_bpe_create(const uint8_t* pieces, const int64_t* offsets, const float* scores,
                         const uint8_t* types, int32_t num_pieces, int32_t splits_at_mark,
                         int64_t cache_bytes) {
  return new (std::nothrow) Bpe(pieces, offsets, scores, types, num_pieces, splits_at_mark != 0,
                                static_cast<size_t>(cache_bytes));
}

void megagpt_bpe_destroy(void* bpe) { delete static_cast<Bpe*>(bpe); }

int64_t megagpt_bpe_encode(void* bpe, const uint8_t* text, const int64_t* offsets,
                           int64_t num_documents, int32_t eod, int32_t token_bytes, void* out,
                           int32_t* lengths) {
  Bpe* encoder = static_cast<Bpe*>(bpe);
  if (token_bytes == 2) {
    return encode_documents(encoder, text, offsets, num_documents, eod,
                            static_cast<uint16_t*>(out), lengths);
  }
  return encode_documents(encoder, text, offsets, num_documents, eod, static_cast<int32_t*>(out),
                          lengths);
}

int64_t megagpt_gather(const uint8_t* bin, int64_t num_tokens, int32_t dtype_code,
                       int32_t token_bytes, const uint8_t* lengths, const uint8_t* pointers,
                       int64_t num_all, const uint32_t* sequences, int64_t num_sequences,
                       const uint32_t* order, int64_t num_order, const uint32_t* marks,
                       int64_t samples_per_mark, const int64_t* indices, int64_t num_samples, int64_t seq_length,
                       int64_t pad, int64_t* out) {
  const int64_t count = seq_length + 1;
  int64_t largest = -1;
  for (int64_t n = 0; n < num_samples; ++n) {
    const int64_t number = order[indices[n]], mark = number / samples_per_mark;
    if (number >= num_order) return -2;
    int64_t place = marks[2 * mark];
    int64_t skip = marks[2 * mark + 1] + number % samples_per_mark * seq_length;
    int64_t* row = out + n * count;
    int64_t filled = 0;
    for (; filled < count && place < num_sequences; ++place) {
      const int64_t sequence = sequences[place];
      if (sequence >= num_all) return -2;
      const int64_t length = load<int32_t>(lengths, sequence);
      const int64_t pointer = load<int64_t>(pointers, sequence), first = pointer / token_bytes;
      if (length < 0 || pointer < 0 || pointer % token_bytes) return -2;
      if (first > num_tokens - length) return -2;
      if (skip >= length) {
        skip -= length;
        continue;
      }
      const int64_t taken = std::min(length - skip, count - filled);
      largest =
          std::max(largest, copy_tokens_of(dtype_code, bin, first + skip, taken, row + filled));
      filled += taken;
      skip = 0;
    }
    std::fill(row + filled, row + count, pad);
  }
  return largest;
}

int64_t megagpt_document_boundaries(const int64_t* tokens, int64_t num_samples, int64_t length,
                                    int64_t eod, int64_t* positions, int32_t* offsets) {
  int64_t count = 0;
  for (int64_t n = 0; n < num_samples; ++n) {
    int64_t begin = n * length;
    for (int64_t i = n * length; i < (n + 1) * length; ++i) {
      if (i == n * length || tokens[i - 1] == eod) {
        begin = i;
        offsets[count++] = static_cast<int32_t>(i);
      }
      positions[i] = i - begin;
    }
  }
  offsets[count] = static_cast<int32_t>(num_samples * length);
  return count;
}

void megagpt_blend(const double* periods, const double* phases, int64_t* counts,
                   int64_t num_members, int64_t count, int32_t* members, int64_t* samples) {
  // Sample k of member d is due at (k + phases[d]) * periods[d]; equal times go to the first.
  const auto due = [&](int64_t d) {
    return (static_cast<double>(counts[d]) + phases[d]) * periods[d];
  };
  using Event = std::pair<double, int64_t>;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events;
  for (int64_t d = 0; d < num_members; ++d) events.emplace(due(d), d);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = events.top().second;
    events.pop();
    members[i] = static_cast<int32_t>(d);
    samples[i] = counts[d]++;
    events.emplace(due(d), d);
  }
}

void megagpt_megatron_blend(const double* weights, int64_t num_members, int64_t count,
                            int32_t* members, int64_t* samples) {
  std::vector<int64_t> counts(static_cast<size_t>(num_members), 0);
  for (int64_t i = 0; i < count; ++i) {
    const double position = std::max(static_cast<double>(i), 1.0);
    int64_t best = 0;
    double largest = weights[0] * position - static_cast<double>(counts[0]);
    for (int64_t d = 1; d < num_members; ++d) {
      const double error = weights[d] * position - static_cast<double>(counts[static_cast<size_t>(d)]);
      if (error > largest) {
        largest = error;
        best = d;
      }
    }
    members[i] = static_cast<int32_t>(best);
    samples[i] = counts[static_cast<size_t>(best)]++;
  }
}

}  // extern "C"

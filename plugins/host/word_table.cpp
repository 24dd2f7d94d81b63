#include "word_table.h"

#include "codec/decode.h"

namespace hqmq {

Words::Words(const RoleParams& role, int heads, const float* secondaries, const float* levels) {
  if (role.storage == Storage::kFp16) return;
  heads_ = heads;
  secondaries_ = role.secondaries;
  radius_bits_ = role.radius_bits;
  head_stride_ = int64_t{4} << IndexBits(role.secondaries);
  words_.resize(static_cast<size_t>(head_stride_) * heads);
  for (int h = 0; h < heads; ++h) {
    for (int s = 0; s < role.secondaries; ++s) {
      const float* q = secondaries + 4 * (int64_t{h} * role.secondaries + s);
      for (int p = 0; p < 12; ++p)
        Codeword(p, q, words_.data() + h * head_stride_ + 4 * (12 * s + p));
    }
  }
  levels_.assign(levels, levels + (size_t{1} << role.radius_bits));
  levels_.resize(levels_.size() + 16);  // looked up eight or sixteen at a time
}

bool Words::Matches(const RoleParams& role, int heads) const {
  return role.storage == Storage::kFp16 ||
         (heads_ == heads && secondaries_ == role.secondaries && radius_bits_ == role.radius_bits);
}

}  // namespace hqmq

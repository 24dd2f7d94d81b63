#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<SmallCodec16<8, true>, SmallCodec16<8, true>, 128, 8>;

}  // namespace cuda
}  // namespace hqmq

#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 8>;

}  // namespace cuda
}  // namespace hqmq

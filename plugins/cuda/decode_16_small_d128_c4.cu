#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 4>;

}  // namespace cuda
}  // namespace hqmq

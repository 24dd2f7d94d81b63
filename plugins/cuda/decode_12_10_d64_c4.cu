#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec12, Codec10, 64, 4>;

}  // namespace cuda
}  // namespace hqmq

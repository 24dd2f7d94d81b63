#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec12, Codec10, 128, 8>;

}  // namespace cuda
}  // namespace hqmq

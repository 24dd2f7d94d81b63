# CUDA from pip packages, for machines without a toolkit: nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm,
# nvidia-cuda-runtime and nvidia-cuda-cccl, all of one CUDA 13 release, for the Python in PATH.
#
# The packages leave out two links that nvcc and CMake look for; they are made in the packages' folder. Sets
# CMAKE_CUDA_COMPILER and CUDAToolkit_ROOT; include before the language CUDA is enabled.
find_program(HQMQ_PYTHON NAMES python3 python REQUIRED DOC "Python whose packages are searched")
mark_as_advanced(HQMQ_PYTHON)
execute_process(
    COMMAND "${HQMQ_PYTHON}" -c "import nvidia.cu13 as m; print(next(iter(m.__path__)))"
    OUTPUT_VARIABLE HQMQ_PIP_CUDA_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT EXISTS "${HQMQ_PIP_CUDA_DIR}/bin/nvcc")
  message(FATAL_ERROR "HQMQ_PIP_CUDA is on but ${HQMQ_PYTHON} has no nvcc: run 'pip install nvidia-cuda-nvcc==13.0.88 "
                      "nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 "
                      "nvidia-cuda-cccl==13.0.85', or install a CUDA toolkit and turn HQMQ_PIP_CUDA off")
endif()
if(NOT EXISTS "${HQMQ_PIP_CUDA_DIR}/lib64")
  file(CREATE_LINK lib "${HQMQ_PIP_CUDA_DIR}/lib64" SYMBOLIC)
endif()
if(NOT EXISTS "${HQMQ_PIP_CUDA_DIR}/lib/libcudart.so")
  file(CREATE_LINK libcudart.so.13 "${HQMQ_PIP_CUDA_DIR}/lib/libcudart.so" SYMBOLIC)
endif()
set(CMAKE_CUDA_COMPILER "${HQMQ_PIP_CUDA_DIR}/bin/nvcc" CACHE FILEPATH "nvcc of the pip packages")
set(CUDAToolkit_ROOT "${HQMQ_PIP_CUDA_DIR}" CACHE PATH "CUDA of the pip packages")
message(STATUS "CUDA from pip packages: ${HQMQ_PIP_CUDA_DIR}")

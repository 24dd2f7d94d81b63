# Finds TensorRT's headers; its libraries are not needed to compile the plugins.
#
#   TensorRT_INCLUDE_DIR      folder of NvInferRuntime.h; given, nothing else is searched
#   TensorRT_ROOT             an unpacked tar (include/), or a prefix of the deb (include/x86_64-linux-gnu/);
#                             also the environment variable
#   the Python in PATH        the package kernel-lens, which holds the headers of 10.14
#
# Defines TensorRT::Headers, TensorRT_INCLUDE_DIR and TensorRTHeaders_VERSION.
set(_hqmq_package_dir "")
if(NOT TensorRT_INCLUDE_DIR)
  find_program(HQMQ_PYTHON NAMES python3 python DOC "Python whose packages are searched")
  mark_as_advanced(HQMQ_PYTHON)
  if(HQMQ_PYTHON)
    execute_process(
        COMMAND "${HQMQ_PYTHON}" -c
                "import importlib.util as u; print(u.find_spec('kernel_lens').submodule_search_locations[0])"
        OUTPUT_VARIABLE _hqmq_package_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
elseif(NOT EXISTS "${TensorRT_INCLUDE_DIR}/NvInferVersion.h")
  message(FATAL_ERROR "TensorRT_INCLUDE_DIR is ${TensorRT_INCLUDE_DIR}, which has no NvInferVersion.h: give the folder "
                      "of TensorRT's headers")
endif()

set(_hqmq_suffixes include include/${CMAKE_LIBRARY_ARCHITECTURE} "")
if(CMAKE_SYSTEM_PROCESSOR)
  list(APPEND _hqmq_suffixes include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu targets/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu/include)
endif()
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h
    HINTS ${TensorRT_ROOT} ENV TensorRT_ROOT ENV TENSORRT_ROOT
    PATHS /usr/local/TensorRT /usr/local/tensorrt /opt/tensorrt
    PATH_SUFFIXES ${_hqmq_suffixes}
    DOC "Folder of NvInferRuntime.h")
if(NOT TensorRT_INCLUDE_DIR AND _hqmq_package_dir)
  find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h PATHS "${_hqmq_package_dir}/include/tensorrt" NO_DEFAULT_PATH)
endif()

if(TensorRT_INCLUDE_DIR)
  set(TensorRTHeaders_VERSION "")
  foreach(_hqmq_part IN ITEMS MAJOR MINOR PATCH)
    # NV_TENSORRT_MAJOR is a number or, in newer headers, a macro of the same ending.
    file(STRINGS "${TensorRT_INCLUDE_DIR}/NvInferVersion.h" _hqmq_line
         REGEX "^#define +(NV_TENSORRT_${_hqmq_part}|TRT_${_hqmq_part}_ENTERPRISE) +[0-9]+" LIMIT_COUNT 1)
    string(REGEX REPLACE "^#define +[A-Z_]+ +([0-9]+).*" "\\1" _hqmq_number "${_hqmq_line}")
    list(APPEND TensorRTHeaders_VERSION "${_hqmq_number}")
  endforeach()
  string(REPLACE ";" "." TensorRTHeaders_VERSION "${TensorRTHeaders_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRTHeaders
    REQUIRED_VARS TensorRT_INCLUDE_DIR
    VERSION_VAR TensorRTHeaders_VERSION
    REASON_FAILURE_MESSAGE
    "TensorRT's headers (NvInferRuntime.h) were not found: set -DTensorRT_ROOT to an unpacked TensorRT tar, install the \
deb package libnvinfer-headers-dev, run 'pip install kernel-lens' for the Python in PATH, or set -DTensorRT_INCLUDE_DIR")
mark_as_advanced(TensorRT_INCLUDE_DIR)

if(TensorRTHeaders_FOUND)
  if(TensorRTHeaders_VERSION VERSION_LESS 10.3)
    message(FATAL_ERROR "TensorRT ${TensorRTHeaders_VERSION} in ${TensorRT_INCLUDE_DIR} is too old: plugins that write "
                        "in place came with 10.3; take headers of 10.3 or newer")
  endif()
  if(NOT TARGET TensorRT::Headers)
    add_library(TensorRT::Headers INTERFACE IMPORTED)
    set_target_properties(TensorRT::Headers PROPERTIES
        INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}"
        INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}")
  endif()
endif()

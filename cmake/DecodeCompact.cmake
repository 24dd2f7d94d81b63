# The compact form of an instance of the fused decode kernel (plugins/cuda/decode_compact.cuh): `text` of a decode_*.cu with
# its codecs made compact, into the variable `out`.
function(hqmq_compact_instance text out)
  set(codec "([A-Za-z0-9]+(<[^>]*>)?)")
  string(REGEX REPLACE "DecodeInstance<${codec}, ${codec}, ([0-9]+), "
                       "DecodeInstance<CompactOf<\\1, \\5>, CompactOf<\\3, \\5>, \\5, " compact "${text}")
  if(compact STREQUAL text)
    message(FATAL_ERROR "no instance of the decode kernel to make a compact one of: ${text}")
  endif()
  set(${out} "${compact}" PARENT_SCOPE)
endfunction()

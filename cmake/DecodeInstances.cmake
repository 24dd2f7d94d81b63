# Instances of the fused decode kernel that are made of others.

# The compact form of an instance (plugins/cuda/decode_compact.cuh): `text` of a decode_*.cu with its codecs made compact,
# into the variable `out`.
function(hqmq_compact_instance text out)
  set(codec "([A-Za-z0-9]+(<[^>]*>)?)")
  string(REGEX REPLACE "DecodeInstance<${codec}, ${codec}, ([0-9]+), "
                       "DecodeInstance<CompactOf<\\1, \\5>, CompactOf<\\3, \\5>, \\5, " compact "${text}")
  if(compact STREQUAL text)
    message(FATAL_ERROR "no instance of the decode kernel to make a compact one of: ${text}")
  endif()
  set(${out} "${compact}" PARENT_SCOPE)
endfunction()

# Whether the instance of a decode_*.cu has one beside it that only cuts by count (kCountBuilt of plugins/cuda/decode.cu).
function(hqmq_has_count_instance source out)
  if(source MATCHES "_d(64|128)_c")
    set(${out} ON PARENT_SCOPE)
  else()
    set(${out} OFF PARENT_SCOPE)
  endif()
endfunction()

# That instance: `text` of a decode_*.cu without the cut by work, into the variable `out`.
function(hqmq_count_instance text out)
  string(REGEX REPLACE "(DecodeInstance<.*, [0-9]+, [0-9]+)>" "\\1, false>" count "${text}")
  if(count STREQUAL text)
    message(FATAL_ERROR "no instance of the decode kernel to make one by count of: ${text}")
  endif()
  set(${out} "${count}" PARENT_SCOPE)
endfunction()

# Writes the compact or count form (`kind`) of `source`, a decode_*.cu of `folder`, into the current binary folder and adds
# its path to the list `out`.
function(hqmq_write_instance kind folder source out)
  file(READ ${folder}/${source} text)
  cmake_language(CALL hqmq_${kind}_instance "${text}" text)
  string(REPLACE decode_ ${CMAKE_CURRENT_BINARY_DIR}/decode_${kind}_ path ${source})
  file(CONFIGURE OUTPUT ${path} CONTENT "${text}" @ONLY)
  set(${out} ${${out}} ${path} PARENT_SCOPE)
endfunction()

#!/usr/bin/env bash
# Builds the emulated GPU's libraries into the folder $1, from the sources beside this script, against the
# LibTorch that LIBTORCH names. Does nothing if they are newer than their sources.

set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
out=$1
mkdir -p "$out"
# Several tests ask for it at the same time.
exec 9>"$out/lock"
flock 9

compile() {
  local library=$1 sources=() source newest
  shift
  while [[ ${1-} == *.cpp ]]; do
    sources+=("$here/$1")
    shift
  done
  newest=$out/$library
  for source in "${sources[@]}" "$here"/{gpu.h,build.sh}; do
    [[ $newest -nt $source ]] || newest=
  done
  [[ -z $newest ]] || return 0
  "${CXX:-c++}" -std=c++17 -O1 -Wall -Wextra -fPIC -shared "${sources[@]}" -o "$out/$library.new" \
    -Wl,-soname,"$library" -L"$out" -Wl,-rpath,"\$ORIGIN" "$@"
  mv "$out/$library.new" "$out/$library"
}

compile libcuda.so.1 driver.cpp kernels.cpp -U_FORTIFY_SOURCE -pthread -ldl
ln -sfn libcuda.so.1 "$out/libcuda.so"
compile libnvrtc.so.13 nvrtc.cpp -l:libcuda.so.1
ln -sfn libnvrtc.so.13 "$out/libnvrtc.so"
ln -sfn libnvrtc.so.13 "$out/libnvrtc-builtins.so.13.99"
compile libnccl.so nccl.cpp -l:libcuda.so.1 -pthread
compile libtorch_cuda.so torch_cuda.cpp -isystem "$LIBTORCH/include" -L"$LIBTORCH/lib" -ltorch_cpu -lc10 -l:libcuda.so.1 \
  -D_GLIBCXX_USE_CXX11_ABI="${LIBTORCH_CXX11_ABI:-1}"
cp -u "$here"/{operators.txt,kernel.h} "$out"

#!/usr/bin/env bash
# Wheels that this project needs beside what a CUDA image has (torch, torchvision, transformers, safetensors and what these
# need), for Python 3.12 on Linux x86_64: to be carried to a machine that has no network.
#   benchmarks/device_wheels.sh DIR
#   then there: python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl && export PYTHONPATH=SITE
# LIMIT_MIB=60 is what may be carried together, --data included; PYTHON=python3 chooses the pip; PYTHON_VERSION=3.12 the target.
set -euo pipefail

dir=${1:?"usage: benchmarks/device_wheels.sh DIR"}
limit=${LIMIT_MIB:-60}

packages=(
  # the project's own needs
  accelerate click filelock jinja2 markupsafe networkx psutil rich markdown-it-py mdurl pygments timm
  torchmetrics lightning-utilities
  # the report of each run of the accuracy grid
  matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six plotly narwhals
  # the smoke test, and int8
  pytest pluggy iniconfig hypothesis sortedcontainers torchao
)
# scikit-learn and scipy, 50 MiB, are for the embedded digits alone and stay behind.

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010; do
  platforms+=(--platform "${tag}_x86_64")
done

mkdir -p "$dir"
if compgen -G "$dir/*" >/dev/null && ! compgen -G "$dir/*.whl" >/dev/null; then
  echo "'$dir' holds something else than wheels; choose another folder" >&2
  exit 1
fi
part=$(mktemp -d "$dir/.part.XXXXXX")
trap 'rm -rf "$part"' EXIT
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$part" "${packages[@]}"
rm -f "$dir"/*.whl # of an earlier call: two versions of a package cannot be installed together
mv "$part"/*.whl "$dir"

bytes=$(cat "$dir"/*.whl | wc -c)
count=$(find "$dir" -maxdepth 1 -name '*.whl' | wc -l)
binary=$(find "$dir" -maxdepth 1 -name '*.whl' ! -name '*-none-any.whl' | wc -l)
awk -v n="$count" -v b="$binary" -v s="$bytes" -v l="$limit" 'BEGIN {
  printf "%d wheels, %d of them binary: %.1f MiB of at most %s MiB; %.1f MiB left for data\n", n, b, s / 2^20, l, l - s / 2^20
  exit s > l * 2^20
}'

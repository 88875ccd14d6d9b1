"""Turn pip's report of an installation (standard input) into the lines of a constraints file (standard output).

The packages that carry CUDA for torch are left out, and so is the ``+cpu`` of a torch without it: torch names the ones
it needs itself, so that the file holds for machines with a GPU and without one.
"""

import json
import re
import sys

CUDA = re.compile(r"nvidia-|cuda-|triton$")


def main() -> None:
    packages = [one["metadata"] for one in json.load(sys.stdin)["install"]]
    pins = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"].partition("+")[0] for one in packages}
    print("# The versions that the tests pass with. Made by: make lock")
    for name, version in sorted(pins.items()):
        if name != "hpc-cpd" and not CUDA.match(name):
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()

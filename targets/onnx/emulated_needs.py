"""What ONNX Runtime needs in the emulated ARM64 system: its wheels."""

from exporter.emulate.arm64.installation import Needs

# The version that .ci/constraints.txt also pins for this machine, for the Pythons of Debian's releases: 3.11 to 3.14.
NEEDS = Needs(
    wheels={
        "onnxruntime==1.32.0": (
            "2303372a85299b6757b0e11e1cbf13e410ddf7e10c37f4b37e99d1c90e7daf7c",
            "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
            "54d02baff2df38777b4c3cc7af326406fe8b8a48f54720f4c446d2d327920a79",
            "4135431395c1f37de0811f452c20a8b774f51812fda6c49611ed9899bbdbeeb4",
        )
    }
)

"""The artifact for Qualcomm's neural processors: stages of a pipeline, compiled binaries, and their emulated run."""

# The pipeline's folder below the artifact's, and the data that both share.
FOLDER = "npu"
DATA_IN_PIPELINE = f"{FOLDER}/model.onnx.data"

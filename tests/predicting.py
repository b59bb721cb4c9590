"""Predictions as the command line makes them, with the memory model of the request's runtime."""

from exporter.device.profile import DeviceProfile
from exporter.predict import prediction
from exporter.predict.prediction import Prediction
from exporter.predict.request import Request
from exporter.targets.memory import memory_of


def predict(profile: DeviceProfile, request: Request) -> Prediction:
    return prediction.predict(profile, request, memory_of(request.runtime, request.format.strip()))

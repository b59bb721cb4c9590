"""The memory of runtimes as `predict` needs it: for a file of which only size, format and parameters are known."""

from exporter.foundation.registry import folders, load
from exporter.predict.memory_from_size import Memory
from exporter.targets.facts import facts_of


def memory_of(runtime: str, format: str) -> Memory | None:
    """Return the memory model of the runtime that loads weights in a format; None for a runtime that is not known.

    Args:
        runtime: Name of a runtime, as users write it; empty for any that is known.
        format: Name of a format, as users write it.
    """
    found = folders("exporter.targets", "memory.py")
    words = [word for name in found for word in facts_of(name).runtime_words]
    if runtime and not any(word in runtime.lower() for word in words):
        return None
    # The one that holds the fewest formats comes first: the reference runtime holds whatever no other does.
    ordered = sorted(found, key=lambda name: facts_of(name).reference)
    models: list[Memory] = [load("exporter.targets.{}.memory", name, found, "target").MEMORY for name in ordered]
    return next((model for model in models if model.holds(format)), None)

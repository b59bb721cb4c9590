"""The bundle: a folder with a model that runtimes load as it is, its evidence, and a manifest of every byte."""

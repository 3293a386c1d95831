"""torchft's own integration tests, as they are installed, over each transport; see ``__main__``."""

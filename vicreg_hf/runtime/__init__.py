"""The ground floor: processes, files, randomness, signals and the machine."""

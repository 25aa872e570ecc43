"""The commands of `vicreg-hf`, a module each; the scripts of a clone call them too."""

"""Write a published encoder from a checkpoint of the authors, lightly or solo-learn."""

from vicreg_hf.commands.convert import main

if __name__ == "__main__":
    main()

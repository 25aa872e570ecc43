"""Write a published encoder from a checkpoint of the authors, lightly or solo-learn."""

from safetensors import SafetensorError

from vicreg_hf.publishing.conversion import convert_checkpoint
from vicreg_hf.settings.command_line import script
from vicreg_hf.settings.parser import FlagsParser


def main() -> None:
    parser = FlagsParser(description=__doc__)
    parser.add_argument("checkpoint", help="A ResNet in .pth, .pt, .ckpt or .safetensors.")
    parser.add_argument("directory", help="The directory to write the encoder to.")
    parser.add_argument("--architecture", help="timm name; found by the shapes if absent.")
    args = parser.parse_args()
    done = convert_checkpoint(args.checkpoint, args.directory, architecture=args.architecture)
    parts = "encoder and expander" if done.has_expander else "encoder"
    print(f"The {parts}, a {done.architecture}, went to {done.directory}.")
    if done.left_out:
        print(f"Left out: {', '.join(done.left_out)}.")


if __name__ == "__main__":
    with script(ValueError, OSError, RuntimeError, SafetensorError):
        main()

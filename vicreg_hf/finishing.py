"""The end of a run: the encoder, its card with what was measured, and the Hub."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from vicreg_hf.cards import CARD_FILE, TrainingRecord, hardware, model_card
from vicreg_hf.hub import HubError
from vicreg_hf.pictures import draw_pictures
from vicreg_hf.publishing import export_encoder, push_model, retry_command
from vicreg_hf.reporting import results, summary
from vicreg_hf.run import Run
from vicreg_hf.sources import ImageSplit


def finish(run: Run) -> Path:
    """Write the encoder and its card, say what was reached, and publish."""
    directory = run.output_dir / "encoder"
    fault: Exception | None = None
    if run.accelerator.is_main_process:
        try:
            export_encoder(run.model, directory, include_expander=True)
            _write_card(run, directory)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the encoder could not be written to {directory}: {error}. The last checkpoint "
                "is whole; free some space and start again to finish."
            ) from error
        print(summary(directory, run.log.rows(), run.monitor))
        try:
            _push(run, directory)
        except HubError as error:
            fault = error
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if fault is not None:
        raise fault
    return directory


def _write_card(run: Run, directory: Path) -> None:
    args, inputs, rows = run.args, run.inputs, run.log.rows()
    train = inputs.train
    pictures = draw_pictures(
        directory, run.model, rows, train=train if isinstance(train, ImageSplit) else None,
        held_out=inputs.held_out,
        num_workers=args.num_workers or 0,
    )  # fmt: skip
    record = TrainingRecord(
        args=args, steps=run.step, seconds=run.seconds,
        images=len(train) if isinstance(train, ImageSplit) else train.num_images,
        hardware=hardware(run.accelerator.device, run.accelerator.num_processes),
        results=results(rows, run.monitor), pictures=pictures,
    )  # fmt: skip
    card = model_card(
        run.model.config, num_features=run.model.num_features, record=record,
        num_parameters=sum(p.numel() for p in run.model.encoder.parameters()),
    )  # fmt: skip
    (directory / CARD_FILE).write_text(str(card), encoding="utf-8")


def _push(run: Run, directory: Path) -> None:
    args = run.args
    if not args.push_to_hub:
        return
    repo_id = str(args.hub_model_id)
    try:
        print(f"\nPublished: {push_model(run.model, repo_id, card=directory)}")
    except HubError as error:
        command = retry_command(args.output_dir or "", repo_id, private=args.hub_private)
        raise HubError(
            f"{error}\nThe encoder is whole in {directory}. Push it again with\n    {command}"
        ) from None

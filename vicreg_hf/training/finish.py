"""The end of a run: the encoder, its card with what was measured, and the Hub."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.hub.api import HubError
from vicreg_hf.hub.card import CARD_FILE, SECOND, model_card, second_card, write_card
from vicreg_hf.hub.export import export_encoder
from vicreg_hf.hub.layout import DIRECTORY
from vicreg_hf.hub.push import push_model
from vicreg_hf.hub.record import TrainingRecord, impersonal
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.publishing.publish import retry_command
from vicreg_hf.publishing.second_encoder import (
    export_second_encoder,
    has_second_encoder,
    push_second_encoder,
)
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.machine import hardware
from vicreg_hf.training.monitoring.summary import card_results, last_message
from vicreg_hf.training.run import Run


def finish(run: Run) -> tuple[Path, HubError | None]:
    """Write the encoder and its card, say what was reached, and publish.

    Returns:
        The directory of the encoder, and what kept it from the Hub.
    """
    directory = run.output_dir / "encoder"
    second = run.output_dir / DIRECTORY if has_second_encoder(run.model) else None
    fault: HubError | None = None
    with failing_together(run.accelerator.device):
        if run.accelerator.is_main_process:
            _write(run, directory, second)
            try:
                _push(run, directory, second)
            except HubError as error:
                fault = error
    return directory, fault


def _write(run: Run, directory: Path, second: Path | None) -> None:
    try:
        places = [directory] if second is None else [directory, second]
        before = run.first_step == run.total_steps and all(
            (p / CARD_FILE).is_file() for p in places
        )
        if not (before and _holds(run, directory)):
            export_encoder(run.model, directory, include_expander=True)
            if second is not None:
                column = run.inputs.pairs.column if run.inputs.pairs else None
                export_second_encoder(run.model, second, column=column)
        if not before:  # an earlier session has, and what was changed in it since is kept
            _write_cards(run, directory, second)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the encoder could not be written to {directory}: {error}. The last checkpoint "
            "is whole; free some space and start again to finish."
        ) from error
    print(last_message(directory, run.log.rows(), run.monitor, second=second))


def _holds(run: Run, directory: Path) -> bool:
    """Whether a directory has this encoder and its expander, whole."""
    try:
        written, _ = load_model(directory)
    except ValueError:
        return False
    saved, own = written.state_dict(), run.model.state_dict()
    return saved.keys() == own.keys() and all(torch.equal(saved[k], own[k].cpu()) for k in own)


def _write_cards(run: Run, directory: Path, second: Path | None) -> None:
    from vicreg_hf.training.monitoring.pictures import draw_pictures

    args, inputs, rows = run.args, run.inputs, run.log.rows()
    train = inputs.train
    pictures = draw_pictures(
        directory, run.model, rows, train=train if isinstance(train, ImageSplit) else None,
        held_out=inputs.held_out,
        num_workers=args.num_workers or 0,
    )  # fmt: skip
    record = TrainingRecord(
        args=args, data=_described(args.dataset_name), hub_id=_hub_id(args.dataset_name),
        steps=run.step, seconds=run.seconds,
        images=train.num_images,
        hardware=hardware(run.accelerator.device, run.accelerator.num_processes),
        results=card_results(rows, run.monitor), pictures=pictures,
    )  # fmt: skip
    card = model_card(
        run.model.config, num_features=run.model.num_features, record=record,
        num_parameters=sum(p.numel() for p in run.model.encoder.parameters()),
    )  # fmt: skip
    write_card(directory / CARD_FILE, card)
    if second is not None:
        assert run.model.prime is not None
        encoder = run.model.prime.backbone
        card = second_card(
            run.model.config, num_features=run.model.prime.num_features, record=record,
            num_parameters=sum(p.numel() for p in encoder.parameters()),
            loader=encoder.loader if isinstance(encoder, TextEncoder) else ("", ""),
        )  # fmt: skip
        write_card(second / CARD_FILE, card)


def _hub_id(dataset_name: str) -> str | None:
    """The data set's id on the Hub, if it is there and not here."""
    return None if dataset_name == DEMO or os.path.exists(dataset_name) else dataset_name


def _described(dataset_name: str) -> str:
    """The data set as a card's sentence names it."""
    if dataset_name == DEMO:
        return "`demo`, scikit-learn's handwritten digits at random places and angles"
    hub_id = _hub_id(dataset_name)
    if hub_id is not None:
        return f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"
    return f"the local data set `{impersonal(dataset_name)}`"


def _push(run: Run, directory: Path, second: Path | None) -> None:
    args = run.args
    if not args.push_to_hub:
        return
    repo_id = str(args.hub_model_id)
    try:
        print(f"\nPublished: {push_model(run.model, repo_id, card=directory)}")
        if second is not None:
            address = push_second_encoder(second, f"{repo_id}{SECOND}", first_id=repo_id)
            print(f"Published: {address}")
    except HubError as error:
        command = retry_command(args.output_dir or "", repo_id, private=args.hub_private)
        raise HubError(
            f"{error}\nThe encoder is whole in {directory}. Push it again with\n    {command}"
        ) from None

"""The end of a run: the encoders are written with their cards, and pushed to the Hub."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.data.opening.items import GIVEN
from vicreg_hf.hub.api import HubError
from vicreg_hf.hub.card import CARD_FILE, model_card, second_card, write_card
from vicreg_hf.hub.layout import PRIME_DIRECTORY
from vicreg_hf.hub.record import Picture, TrainingRecord, impersonal
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.publishing.publish import export_encoders, push_encoders, retry_command
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.machine import hardware
from vicreg_hf.training.choosing import chosen_step, describe_choice, load_chosen
from vicreg_hf.training.monitoring.summary import card_results, last_message
from vicreg_hf.training.run import Run


def finish_run(run: Run) -> tuple[Path, HubError | None]:
    """Write the encoders and their cards, print how good they are, and push them.

    Returns:
        The directory of the encoder, and why it could not be pushed.
    """
    directory = run.output_dir / "encoder"
    fault: HubError | None = None
    with (
        run.whole_weights(main_process_only=True), failing_together(run.accelerator.device),
    ):  # fmt: skip
        if run.accelerator.is_main_process:
            second = _write(run, directory)
            try:
                _push(run, directory, second)
            except HubError as error:
                fault = error
    return directory, fault


def _write(run: Run, directory: Path) -> Path | None:
    """Write both encoders; return the directory of the second if there is one."""
    load_chosen(run)
    try:
        column = run.inputs.pairs.column if run.inputs.pairs else None
        place = run.output_dir / PRIME_DIRECTORY
        second = export_encoders(run.published, directory, place, column=column)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the encoder could not be written to {directory}: {error}. The last checkpoint "
            "is whole; free some space and start again to finish."
        ) from error
    directories = [directory, *([] if second is None else [second])]
    complete = all((place / CARD_FILE).is_file() for place in directories)
    # cards that an earlier session has written may have been edited since
    if run.first_step < run.total_steps or not complete:
        with optional(f"a model card is left out of {run.output_dir}"):
            _write_cards(run, directory, second)
    print(last_message(run, directory, second))
    return second


def _write_cards(run: Run, directory: Path, second: Path | None) -> None:
    args = run.args
    pictures: list[Picture] = []
    with optional("the model card is without some of its pictures"):
        from vicreg_hf.training.monitoring.pictures import draw_pictures

        for picture in draw_pictures(run, directory):
            pictures.append(picture)  # noqa: PERF402 # those before one that fails are kept
    run.trackers.show(
        [directory / picture.file for picture in pictures], step=run.step,
        publish_images=args.publish_images,
    )  # fmt: skip
    name = args.dataset_name.removeprefix(GIVEN)
    record = TrainingRecord(
        args=asdict(args) | {"dataset_name": name}, loss=run.loss_name,
        num_views=args.num_views, data=_described(args.dataset_name),
        hub_id=_hub_id(args.dataset_name), images=run.inputs.train.num_images,
        steps=chosen_step(run), seconds=run.seconds,
        hardware=hardware(run.accelerator.device, run.accelerator.num_processes),
        results=card_results(run), pictures=pictures, choice=describe_choice(run),
        starts=run.starts, left_out=run.inputs.bad.reasons, not_opened=run.inputs.left_out,
    )  # fmt: skip
    write_card(directory / CARD_FILE, model_card(run.published, record=record))
    if second is not None:
        assert run.published.prime is not None
        encoder = run.published.prime.backbone
        card = second_card(
            run.published.config, encoder=encoder, num_features=run.published.prime.num_features,
            record=record,
            loader=encoder.loader if isinstance(encoder, TextEncoder) else ("", ""),
        )  # fmt: skip
        write_card(second / CARD_FILE, card)


def _hub_id(dataset_name: str) -> str | None:
    """The data set's id on the Hub, if it is there and not here."""
    given = dataset_name == DEMO or dataset_name.startswith(GIVEN)
    # a path is one also where the disk that it was on is no longer there
    local = os.path.exists(dataset_name) or impersonal(dataset_name) != dataset_name
    return None if given or local else dataset_name


def _described(dataset_name: str) -> str:
    """The data set as a card's sentence names it."""
    if dataset_name == DEMO:
        return "`demo`, scikit-learn's handwritten digits at random places and angles"
    if dataset_name.startswith(GIVEN):
        return f"`{dataset_name.removeprefix(GIVEN)}`, a data set of its trainer's own"
    hub_id = _hub_id(dataset_name)
    if hub_id is not None:
        return f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"
    return f"the local data set `{impersonal(dataset_name)}`"


def _push(run: Run, directory: Path, second: Path | None) -> None:
    args = run.args
    if not args.push_to_hub:
        return
    private, repo_id = args.hub_private or None, str(args.hub_model_id)
    try:
        print()
        for address in push_encoders(
            directory, second, repo_id, private=private, publish_images=args.publish_images,
            license=args.license,
        ):  # fmt: skip
            print(f"Published: {address}")
    except HubError as error:
        command = retry_command(args.output_dir or "", repo_id, private=args.hub_private,
                                publish_images=args.publish_images)  # fmt: skip
        raise HubError(
            f"{error}\nThe encoder is whole in {directory}. Push it again with\n    {command}"
        ) from None

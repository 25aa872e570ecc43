"""The name under which published model cards import `spectrogram_image`."""

from vicreg_hf.data.columns.spectrograms import spectrogram_image

__all__ = ["spectrogram_image"]

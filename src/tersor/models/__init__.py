"""What does a decoder compute? One for all architectures, driven by a config value; weights come from safetensors."""

from tersor.models.config import DecoderConfig, supported
from tersor.models.decoder import Decoder
from tersor.models.load import load
from tersor.models.random import random_decoder

__all__ = ["Decoder", "DecoderConfig", "load", "random_decoder", "supported"]

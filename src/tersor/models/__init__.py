"""What does a decoder compute? One for all architectures, driven by a config value; weights come from safetensors."""

from tersor.models.config import DecoderConfig, supported
from tersor.models.decoder import Decoder
from tersor.models.load import load

__all__ = ["Decoder", "DecoderConfig", "load", "supported"]

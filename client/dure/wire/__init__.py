"""What every program of Dure shares on the wire: errors, names, quantities, tokens, channels, settings."""

VERSION = "0.1.0"

"""The command line: parsing and dispatch. Nothing here may import torch before a command needs it."""

"""The release of emaswap; every manifest carries it."""

__version__ = "0.1.0"

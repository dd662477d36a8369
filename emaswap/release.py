"""The release of emaswap; every manifest carries it."""

RELEASE = "0.1.0"

"""What Hope's architecture is for, measured beside a Transformer++ and a gated DeltaNet."""

"""End-to-end training of whole-slide-image models: tile encoder and slide aggregator together."""

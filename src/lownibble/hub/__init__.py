"""The hub: adapters and models with a card rendered from their records (`card.py`), and their upload (`push.py`). No torch."""

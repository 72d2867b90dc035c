"""Passes: the contract, the manager, the gates, and one pass per file in folders by family."""

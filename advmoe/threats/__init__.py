"""What an attacker gets who writes the training data, or who can only ask."""

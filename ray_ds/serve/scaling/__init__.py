"""How many replicas a load needs: what replicas report, and the rule that follows from it. Knows no Ray."""

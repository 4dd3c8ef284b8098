"""Groups of processes that divide one model, its experts or its rows between them. No DeepSpeed here."""

"""What a version is: its description, its architecture, its probe, its proof. Knows no store."""

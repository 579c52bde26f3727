"""What a job may ask and what it yields: below the engines and the modes, and knows of neither."""

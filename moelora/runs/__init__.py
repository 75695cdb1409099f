"""What train/ and eval/ share that is neither: configuration, models, data, folders, words on the screen."""

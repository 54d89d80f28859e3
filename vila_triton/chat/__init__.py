"""Conversations: how questions, images and answers become token ids, and what is kept from turn to turn.

    conversation        `ChatModel`, `Conversation`: ask, fork and undo; turns share one paged cache
    conversation_file   a conversation saved to a safetensors file and loaded again
    cli_session         the state of `vila-triton chat` and its lines that begin with "/"
    model_memory        caches that all conversations of a model share, dropped when the model changes
    prompts             questions with `<image>` in them to token ids, turn by turn
    templates           the chat templates of VILA's language models
    special_tokens      aliases of special tokens, so that a user's text cannot spell them
    tokenizer           the tokenizer of a checkpoint folder, without transformers' Auto classes
    llama_tokenizer     LLaMA's SentencePiece tokenizer with the ids that VILA was trained on

Nothing here imports `vila_triton.hf`: a model comes in as an argument (`model_memory.VilaModel` says what is needed of
it), and `vila_triton.hf.chat_model.load_chat_model` loads one from a folder.
"""

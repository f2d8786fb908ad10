"""What synthetic conversations begin with."""

# Short beginnings of user turns; the model writes the rest.
OPENERS = (
    # writing
    "Write", "Write a short story about", "Write a poem", "Write an email to", "Draft",
    "Compose", "Describe", "Come up with", "Rewrite", "Edit the following", "Improve",
    "Write a blog post about", "Create a catchy title for", "Write a product description",
    # roleplay
    "Imagine you are", "Pretend to be", "You are a", "Act as", "Take the role of",
    "Picture yourself as", "Suppose you were",
    # reasoning
    "Why", "Explain why", "If", "What would happen if", "Which is", "Is it true that",
    "Compare", "What are the advantages of", "What is the difference between",
    "Think step by step:", "A man", "There are", "Which word does not belong",
    # maths
    "Solve:", "Calculate", "What is the sum of", "How many", "Find the value of", "Prove that",
    "A train", "A store sells", "If x", "The area of", "What is the probability",
    # coding
    "Implement a function that", "Write a Python", "Write a program", "Write a SQL query",
    "Debug", "How do I", "In JavaScript,", "Given an array", "Write a regex", "Design a class",
    "Explain this code:", "What does the following", "Write a C++",
    # extraction and rewriting
    "Extract", "Summarize", "Summarize the following", "List", "Classify", "Identify",
    "Translate", "Convert", "Given the following text,", "Fill in", "Format", "Rank",
    "Evaluate the following", "Turn this",
    # science
    "Explain", "What causes", "How does", "What is", "In the field of", "Describe how",
    "What happens when", "Explain to a child", "Discuss",
    # humanities
    "Who was", "What were the", "Provide insights into", "Analyze", "How did", "When did",
    "What role did", "Write an essay", "Discuss the impact of", "What do you think about",
    # everyday
    "Can you", "Could you", "Please", "I need", "I want to", "My", "Help me", "Give me",
    "Suggest", "Recommend", "Tell me", "What should I", "How can I", "Plan", "Hello", "I am",
    "What are some tips for", "Where",
)  # fmt: skip

# Beginnings that a topic follows: a random word, so that the model does not always write about the
# same few things.
TOPIC_OPENERS = (
    "", "Write about", "Write a story about a", "Write a poem about", "Write a letter about",
    "Write a short dialogue between a", "Draft a speech on", "Create a plan for", "Describe a",
    "Describe the", "Explain", "Explain the concept of", "Explain how", "Explain why", "What is",
    "What is a", "What are", "Why do", "Why is", "How do you", "How does a", "How can I",
    "Tell me about", "Tell me a joke about", "Give me ideas for", "List some", "Name five",
    "Compare", "Compare the", "What is the difference between", "Imagine you are a",
    "You are a", "Pretend to be a", "Act as a", "Suppose that", "If a", "There are three",
    "A farmer has", "Two", "Calculate the", "Solve this problem about", "How many",
    "Write a function that", "Write a Python program for", "Write a script to", "Write a class for",
    "Write an SQL query for", "Summarize this text about", "Summarize the following passage:",
    "Extract the", "Classify the following:", "Translate", "Rewrite this sentence about",
    "Correct this sentence:", "Read this paragraph:", "Here is a text about", "In the following",
    "Who invented", "Who was", "When was", "Where is", "Discuss the role of", "Analyze the",
    "What do historians say about", "Argue for", "Is it ethical to", "Should", "My", "I have a",
    "I feel", "I am writing about", "Recommend a", "Suggest a name for", "Evaluate the",
)  # fmt: skip

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers briefly.",
    "You are an expert who explains things clearly and in detail.",
    "Answer the user's question as well as you can.",
    "You are a careful teacher. Think step by step.",
    "",
)

# Beginnings of plain text, for models without a chat template.
TEXT_SEEDS = (
    "The", "In", "A", "It was", "When", "According to", "This article", "How to", "I", "We",
    "Once upon a time", "Question:", "def ", "import ", "# ", "The following", "Although", "By",
    "For", "As a result", "She", "He", "They", "On", "At", "1.", "Title:", "Abstract", "Chapter",
    "There is", "One of the", "What is",
)  # fmt: skip

// The server's API: the served model, and streams of what is new of an answer.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

export async function servedModel(key) {
  const response = await request("/v1/models", key);
  return (await response.json()).data[0];
}

// Yields {details, finish_reason} for every event of a chat answer.
export async function* streamChat(body, key, signal) {
  const response = await request("/v1/chat/completions", key, {
    method: "POST",
    signal,
    body: JSON.stringify({ ...body, stream: true, return_details: true }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The connection ended before the answer did.");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const json = JSON.parse(data);
      if (json.error) throw new ApiError(0, json.error.message);
      yield json.choices[0];
    }
  }
}

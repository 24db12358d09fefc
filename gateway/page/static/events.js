// Server-sent events.

/** Returns a function that takes the next piece of a stream's text, and returns the events that it completes. */
export function eventParser() {
  let rest = '';
  return (text) => {
    const blocks = (rest + text).split('\n\n');
    rest = blocks.pop();
    return blocks.map(parseBlock).filter(({ data }) => data);
  };
}

function parseBlock(block) {
  const fields = { event: 'message', data: '' };
  for (const line of block.split('\n')) {
    const colon = line.indexOf(': ');
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  return fields;
}

/** Yields the events of a response's body as they arrive. */
export async function* readEvents(body) {
  const parse = eventParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) yield* parse(part.value);
}

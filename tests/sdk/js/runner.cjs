// Runs the checks of a client for several targets, and prints what each returned as a line of JSON: [check, target,
// result], or [check, target, null, error]. The argument is JSON: targets (see tests/sdk/python_clients.py), checks,
// audio.
const hello = 'Hello there';

// Records the seconds before each retry, which is then made without a wait. Other timers of the client are longer or
// shorter; Node.js has its own.
async function withoutWaits(act) {
  const waits = [];
  const original = globalThis.setTimeout;
  globalThis.setTimeout = (callback, milliseconds, ...rest) => {
    const isOfClient = new Error().stack.includes('node_modules');
    const isWait = isOfClient && milliseconds >= 300 && milliseconds <= 60_000;
    if (isWait) waits.push(milliseconds / 1000);
    return original(callback, isWait ? 0 : milliseconds, ...rest);
  };
  try {
    return { waits, text: await act() };
  } finally {
    globalThis.setTimeout = original;
  }
}

// The checks that are the same for all clients. `ask` and `read` of a client take a target and { key, prompt,
// temperature, retries, fetch }; `describe` takes an error.
function shared({ ask, read, describe }) {
  return {
    async stream(target) {
      return { whole: await ask(target, { prompt: hello }), text: await read(target, { prompt: hello }) };
    },
    async errors(target) {
      const found = {};
      for (const [name, failure] of Object.entries(target.failures)) {
        try {
          await (failure.stream ? read : ask)(target, { prompt: hello, ...failure });
          found[name] = ['no error', null, null];
        } catch (error) {
          found[name] = describe(error);
        }
      }
      return found;
    },
    async retries(target) {
      await fetch(`${target.control}/hold`, { method: 'POST' });
      const releasing = async (...asked) => {
        const response = await fetch(...asked);
        if (!response.ok) await fetch(`${target.control}/release`, { method: 'POST' });
        return response;
      };
      const options = { key: target.retry_key, prompt: target.retry_prompt, retries: 2, fetch: releasing };
      return withoutWaits(() => ask(target, options));
    },
  };
}

async function run(checks) {
  const { targets, checks: names, audio } = JSON.parse(process.argv[2]);
  for (const each of targets) {
    const target = { ...each, audio };
    for (const name of names) {
      let line;
      try {
        line = [name, target.name, await checks[name](target)];
      } catch (error) {
        line = [name, target.name, null, String(error.stack)];
      }
      console.log(JSON.stringify(line));
    }
  }
}

module.exports = { hello, run, shared };

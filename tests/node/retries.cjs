// Makes calls with a retry policy and prints their outcomes: {id: {code, details, content, seconds}}.
// Its argument is JSON: proto (folder), address, key, policy (a service config), calls ({id, method, prompt}).
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const options = JSON.parse(process.argv[2]);
const definition = loader.loadSync('pomelo/v1/task_service.proto', {
  includeDirs: [options.proto], keepCase: true, enums: String, oneofs: true,
});
const { TaskService } = grpc.loadPackageDefinition(definition).pomelo.v1;
const client = new TaskService(options.address, grpc.credentials.createInsecure(), {
  'grpc.service_config': options.policy,
});

function outcome(start, error, content) {
  const details = error?.metadata?.get('grpc-status-details-bin')[0];
  return {
    code: grpc.status[error ? error.code : 0],
    details: details ? details.toString('base64') : '',
    content,
    seconds: (Date.now() - start) / 1000,
  };
}

function run({ method, prompt }) {
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${options.key}`);
  const messages = [{ role: 'ROLE_USER', content: [{ text: prompt }] }];
  const request = { spec: { model: 'gpt-4', text: { messages } } };
  const start = Date.now();
  return new Promise((resolve) => {
    if (method === 'RunTask') {
      client.RunTask(request, metadata, (error, response) => {
        resolve(outcome(start, error, response ? response.result.text.message.content[0].text : ''));
      });
      return;
    }
    let content = '';
    const call = client.StreamTask(request, metadata);
    call.on('data', ({ event }) => { content += event.text_delta?.text ?? ''; });
    call.on('error', (error) => resolve(outcome(start, error, content)));
    call.on('end', () => setImmediate(() => resolve(outcome(start, null, content))));
  });
}

Promise.all(options.calls.map(async (call) => [call.id, await run(call)])).then((results) => {
  console.log(JSON.stringify(Object.fromEntries(results)));
  client.close();
});

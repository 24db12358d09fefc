// Makes calls with a retry policy and prints how each ended: {id: {code, details, error, content, seconds}}.
// Its argument is JSON: proto (folder), address, key, policy (a service config), calls ({id, method, prompt}).
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const given = JSON.parse(process.argv[2]);
const definition = loader.loadSync('pomelo/v1/task_service.proto', {
  includeDirs: [given.proto], keepCase: true, enums: String, oneofs: true,
});
const { TaskService } = grpc.loadPackageDefinition(definition).pomelo.v1;
const client = new TaskService(given.address, grpc.credentials.createInsecure(), {
  'grpc.service_config': given.policy,
});

function ended(began, error, content) {
  const details = error?.metadata?.get('grpc-status-details-bin')[0];
  return {
    code: grpc.status[error ? error.code : 0],
    details: details ? details.toString('base64') : '',
    content,
    seconds: (Date.now() - began) / 1000,
  };
}

function run({ method, prompt }) {
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${given.key}`);
  const request = { task: { model: 'gpt-4', text: { messages: [{ role: 'ROLE_USER', content: prompt }] } } };
  const began = Date.now();
  return new Promise((resolve) => {
    if (method === 'RunTask') {
      client.RunTask(request, metadata, (error, response) => {
        resolve(ended(began, error, response ? response.result.text.content : ''));
      });
      return;
    }
    let content = '';
    const call = client.StreamTask(request, metadata);
    call.on('data', (event) => { content += event.text_delta?.content ?? ''; });
    call.on('error', (error) => resolve(ended(began, error, content)));
    call.on('end', () => setImmediate(() => resolve(ended(began, null, content))));
  });
}

Promise.all(given.calls.map(async (call) => [call.id, await run(call)])).then((results) => {
  console.log(JSON.stringify(Object.fromEntries(results)));
  client.close();
});

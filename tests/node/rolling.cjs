// Makes calls one after another in several loops until its input ends and each has made enough, and prints {calls,
// errors}: how many, and the text of each that failed. Its argument is JSON: proto (folder), address, key, policy (a
// service config), loops, enough (calls).
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
const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${options.key}`);
const messages = [{ role: 'ROLE_USER', content: [{ text: 'Hello' }] }];
const request = { spec: { model: 'gpt-4', text: { messages } } };

let stopped = false;
process.stdin.resume().on('end', () => { stopped = true; });

async function loop(result) {
  for (let made = 0; !stopped || made < options.enough; made += 1) {
    await new Promise((resolve) => {
      client.RunTask(request, metadata, (error) => {
        result.calls += 1;
        if (error) result.errors.push(String(error));
        resolve();
      });
    });
  }
}

const result = { calls: 0, errors: [] };
Promise.all(Array.from({ length: options.loops }, () => loop(result))).then(() => {
  console.log(JSON.stringify(result));
  client.close();
});
